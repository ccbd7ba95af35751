"""What can be known of masks, normalisers and updates as expressions, without evaluating them."""
