"""Channels between layers scaled, or mixed, for the least rounding noise: where it is exact, and by what."""
