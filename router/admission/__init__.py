"""Who may go on now: saturation, the waiting line of each deployment, demand."""
