"""What every page of this package shares: one HTML file that loads nothing, charts as SVG."""
