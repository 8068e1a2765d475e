"""An evaluation of our own that needs no download: eight abilities that come before knowledge does."""
