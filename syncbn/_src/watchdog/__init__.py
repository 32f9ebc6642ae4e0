"""What each rank is at, and what happens when one does not come."""
