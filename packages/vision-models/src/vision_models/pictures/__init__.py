"""What people look at: predictions, tables of classes, attention."""
