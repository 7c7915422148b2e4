//! Load generator, contenders and report.

fn main() {}
