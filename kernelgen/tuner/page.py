"""A page about studies: one HTML file that needs no other."""
