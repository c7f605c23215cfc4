"""What the methods are judged by."""
