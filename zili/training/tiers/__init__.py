"""The places that hold a run's checkpoints: its folder, local disks, object stores."""
