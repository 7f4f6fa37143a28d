"""The parts of batch augmentation: maps of the plane, changes of colour, and the policy that chooses among both."""
