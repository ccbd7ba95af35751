from . import syntax
def attach(file): return file
