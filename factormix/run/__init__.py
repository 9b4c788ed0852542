"""What every command shares: errors, typed configs, output directories, resumable work, run.json, progress."""
