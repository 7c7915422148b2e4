//! Aligned columns.

use super::human::printable;

/// Rows under a heading, as wide as their widest cell.
#[derive(Debug)]
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these headings.
    pub(crate) fn new(headings: &[&str]) -> Self {
        Self { rows: vec![headings.iter().map(|&heading| heading.to_owned()).collect()] }
    }

    /// Adds a row. What servers and nodes say may hold terminal control characters: they are made visible.
    pub(crate) fn row<Cell: AsRef<str>>(&mut self, cells: impl IntoIterator<Item = Cell>) {
        let cells = cells.into_iter().map(|cell| match printable(cell.as_ref()) {
            text if text.is_empty() => "-".to_owned(),
            text => text,
        });
        self.rows.push(cells.collect());
    }

    /// The text, one line for each row, without spaces at line ends.
    pub(crate) fn render(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            self.rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, &width) in row.iter().zip(&widths) {
                line.push_str(cell);
                line.extend(std::iter::repeat_n(' ', width - cell.chars().count() + 3));
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_empty_cells_are_dashes() {
        let mut table = Table::new(&["NAME", "ADDRESSES", "STATE"]);
        table.row(["a", "10.88.0.11, fd88::11", "active"]);
        table.row(["long-name", "", "lost"]);
        let expected = "\
NAME        ADDRESSES              STATE
a           10.88.0.11, fd88::11   active
long-name   -                      lost
";
        assert_eq!(table.render(), expected);
    }

    #[test]
    fn a_hostile_cell_cannot_drive_the_terminal() {
        let mut table = Table::new(&["REASON"]);
        table.row(["\x1b]0;owned\x07\nline"]);
        assert_eq!(table.render(), "REASON\n\\u{1b}]0;owned\\u{7}\\nline\n");
    }
}
