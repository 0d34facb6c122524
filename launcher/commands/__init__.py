"""What each command of the command line does: call `launcher.api`, print, return the exit code."""
