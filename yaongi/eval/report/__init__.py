"""What evaluations found, where a person looks: a file, a table, a page."""
