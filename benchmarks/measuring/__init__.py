"""How it is measured: jobs, the processes of a job, what they run, and the presentation."""
