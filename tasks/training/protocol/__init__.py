"""What the processes of a training tell each other, and how long they wait for each other."""
