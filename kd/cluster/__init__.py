"""Where ranks run: this machine, the hosts of a hostfile, or a SLURM cluster."""
