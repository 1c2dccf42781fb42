"""Run folders: what lies in them, how they are made, exported, looked at and cleaned up."""
