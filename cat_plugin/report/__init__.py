"""What a quantization did, as one HTML file; and what is recorded in a bundle so that there is something to show."""
