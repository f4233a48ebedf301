"""What can go wrong on a cluster before the first step, found in a minute."""
