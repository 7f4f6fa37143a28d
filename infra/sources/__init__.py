"""What a user may name as a data set: `find` finds it, and one module a kind brings it into the bucket."""
