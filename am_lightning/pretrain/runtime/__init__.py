"""What every program of the recipes needs: command line, run configuration, signals, errors."""
