"""The recipes that come with padst, one YAML file each: `--recipe NAME` finds them here, and `padst study` its own."""
