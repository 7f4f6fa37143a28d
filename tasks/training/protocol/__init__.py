"""The messages between the processes of a training, and how long each process waits for the others."""
