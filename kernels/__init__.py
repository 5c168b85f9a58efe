"""Device code: each module has a torch reference and a Triton kernel with one signature."""
