"""What a run will need before it starts: memory, time and communication, by arithmetic."""
