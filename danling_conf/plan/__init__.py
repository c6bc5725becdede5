"""What a layout costs, without its devices."""
