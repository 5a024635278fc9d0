"""Results as one self-contained HTML file that needs no network."""
