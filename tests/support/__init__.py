"""What several test files share: models, servers, the command line, reference arithmetic."""
