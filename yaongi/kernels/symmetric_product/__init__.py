"""α·X·Yᵀ + β·C for results known to be symmetric."""
