"""The engine process, and its communication with the HTTP process."""
