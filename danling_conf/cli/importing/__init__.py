"""Translation of DanLing's configurations."""
