"""What a job of several processes needs around the layers."""
