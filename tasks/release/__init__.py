"""From weights to champion: decide, register, try, judge, approve, promote, describe."""
