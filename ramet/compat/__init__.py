"""Other frontends on Ramet: programs written for them run after one changed import."""
