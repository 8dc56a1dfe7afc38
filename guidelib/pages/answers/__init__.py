"""What is right and what helps in the exercises, a file per page.  Reading them gives the answers away."""
