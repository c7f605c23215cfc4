"""A writable Hugging Face Hub on the loopback interface, so that push and pull are tested without a network."""
