"""The procedural town: streets, pictures, labels and depth from one seed."""
