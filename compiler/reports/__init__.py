"""What people look at: `show`, `explain`, pictures, the stages of the road, what works here."""
