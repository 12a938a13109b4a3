"""What makes this package known to others. Each module needs the package that it is named after."""
