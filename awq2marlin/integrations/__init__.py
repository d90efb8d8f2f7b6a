"""What lets inference engines load Marlin-native checkpoints, one package or module an engine."""
