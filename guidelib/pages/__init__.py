"""What a page shows and a reader tries: figures, tables, exercises, and the set-up of a notebook."""
