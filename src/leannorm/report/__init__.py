"""Records in, pages and text out; nothing here measures or decides anything."""
