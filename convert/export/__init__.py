"""From a finished checkpoint to the formats that other engines read."""
