"""What only the pages need: figures, analysis, widgets, grids."""
