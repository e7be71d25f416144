"""What is trained: roundings, steps, losses, and the loop that descends them."""
