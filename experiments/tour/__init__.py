"""The tour: one study of each family, one after another, and a page that shows what they did."""
