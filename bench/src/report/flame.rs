//! Flame graphs of what `perf script` prints: where the processor time of a profile went, as an SVG without scripts.
//!
//! After Brendan Gregg, "The Flame Graph" (ACM Queue 14/2, 2016): a frame's width is its share of the samples, it stands
//! on its caller, and its place from left to right has no meaning.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::io::{self, BufRead};

const WIDTH: f64 = 1200.0;
const ROW: f64 = 16.0;
/// A letter of the font that is used, roughly.
const LETTER: f64 = 6.2;
/// Narrower frames are left out.
const LEAST: f64 = 1.5;
/// Deeper stacks are cut off: perf itself records 127 frames.
const DEPTH: usize = 128;

/// What perf calls frames that it cannot name: callers, where a program has no frame pointers. They tell nothing.
const UNKNOWN: &str = "[unknown]";

/// Samples by call stack.
#[derive(Debug, Default)]
pub struct Profile {
    samples: u64,
    kernel: bool,
    callees: BTreeMap<String, Profile>,
}

impl Profile {
    /// Reads the output of `perf script -F comm,ip,sym`: for each sample a line with the thread's name, then its frames, the
    /// innermost first, each with address and symbol, then an empty line.
    pub fn read(input: impl BufRead) -> io::Result<Self> {
        let mut profile = Self::default();
        let mut thread: Option<String> = None;
        let mut frames: Vec<(String, bool)> = Vec::new();
        for line in input.lines().chain([Ok(String::new())]) {
            let line = line?;
            let text = line.trim();
            if text.is_empty() {
                if let Some(thread) = thread.take() {
                    frames.push((thread, false));
                    profile.add(frames.iter().rev().take(DEPTH));
                }
                frames.clear();
            } else if !line.starts_with(char::is_whitespace) {
                thread = Some(text.to_owned());
            } else if let Some((address, symbol)) = text.split_once(' ')
                && symbol.trim() != UNKNOWN
            {
                // The kernel has the upper half of the addresses.
                frames.push((plain(symbol).to_owned(), address.len() == 16 && address.starts_with('f')));
            }
        }
        Ok(profile)
    }

    fn add<'a>(&mut self, stack: impl Iterator<Item = &'a (String, bool)>) {
        self.samples += 1;
        let mut at = self;
        for (name, kernel) in stack {
            at = at.callees.entry(name.clone()).or_default();
            at.samples += 1;
            at.kernel = *kernel;
        }
    }

    /// How many samples there are.
    pub fn samples(&self) -> u64 {
        self.samples
    }

    /// The graph. The kernel's frames are blue, the programs' own red.
    pub fn svg(&self, title: &str) -> String {
        let scale = WIDTH / self.samples.max(1) as f64;
        let rows = self.height(scale);
        let height = (rows as f64 + 2.5) * ROW;
        let mut out = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"monospace\" \
             font-size=\"10\">\n<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n<text x=\"4\" y=\"14\" \
             font-size=\"12\">{} ({} samples; blue: the kernel)</text>\n",
            escaped(title),
            self.samples
        );
        self.draw(&mut out, scale, 0.0, height - ROW, self.samples);
        out.push_str("</svg>\n");
        out
    }

    fn height(&self, scale: f64) -> usize {
        let drawn = self.callees.values().filter(|callee| callee.samples as f64 * scale >= LEAST);
        drawn.map(|callee| 1 + callee.height(scale)).max().unwrap_or(0)
    }

    fn draw(&self, out: &mut String, scale: f64, x: f64, y: f64, all: u64) {
        let mut x = x;
        for (name, callee) in &self.callees {
            let width = callee.samples as f64 * scale;
            if width >= LEAST {
                let share = 100.0 * callee.samples as f64 / all as f64;
                let label = escaped(&shortened(name, (width / LETTER) as usize));
                // Writing to a String cannot fail.
                writeln!(
                    out,
                    "<g><title>{}: {share:.1} %</title><rect x=\"{x:.1}\" y=\"{y:.0}\" width=\"{:.1}\" height=\"{}\" \
                     fill=\"{}\"/><text x=\"{:.1}\" y=\"{:.0}\">{label}</text></g>",
                    escaped(name),
                    width - 0.5,
                    ROW - 1.0,
                    colour(name, callee.kernel),
                    x + 2.0,
                    y + 11.0,
                )
                .unwrap_or_default();
                callee.draw(out, scale, x, y - ROW, all);
            }
            x += width;
        }
    }
}

/// A symbol without its offset, its module, and the hash that Rust gives it.
fn plain(symbol: &str) -> &str {
    let name = symbol.rsplit_once("+0x").map_or(symbol, |(name, _)| name);
    match name.rsplit_once("::h") {
        Some((path, hash)) if hash.len() == 16 && hash.bytes().all(|b| b.is_ascii_hexdigit()) => path,
        _ => name,
    }
}

/// The end of a path says more than its beginning.
fn shortened(name: &str, letters: usize) -> String {
    let count = name.chars().count();
    match letters {
        0..3 => String::new(),
        _ if count <= letters => name.to_owned(),
        _ => format!("…{}", name.chars().skip(count + 1 - letters).collect::<String>()),
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// The same name has the same shade everywhere.
fn colour(name: &str, kernel: bool) -> String {
    let shade = name.bytes().fold(7_u32, |sum, byte| sum.wrapping_mul(31).wrapping_add(u32::from(byte))) % 40;
    let (hue, light) = if kernel { (205, 62 + shade / 2) } else { (8, 60 + shade / 2) };
    format!("hsl({hue}, 65%, {light}%)")
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCRIPT: &str = "worker-0\n\tffffffff81000010 tcp_sendmsg+0x10\n\t    55550000 relay::write::h0123456789abcdef+0x1f\n\n\
                          worker-0\n\t    55550000 relay::write::h0123456789abcdef+0x2f\n\t    7fff0000 [unknown]\n\n";

    #[test]
    fn r37_samples_are_added_up_from_the_outermost_frame_inwards() {
        let profile = Profile::read(SCRIPT.as_bytes()).unwrap();
        assert_eq!(profile.samples(), 2);
        let write = &profile.callees["worker-0"].callees["relay::write"];
        assert_eq!((write.samples, write.kernel), (2, false));
        let send = &write.callees["tcp_sendmsg"];
        assert_eq!((send.samples, send.kernel), (1, true));
        let svg = profile.svg("a <test>");
        assert!(svg.contains("tcp_sendmsg: 50.0 %") && svg.contains("a &lt;test&gt;"), "{svg}");
    }

    #[test]
    fn nothing_and_nonsense_give_an_empty_graph() {
        for input in ["", "\n\n\n", "\tffff frame without a thread\n", "thread alone"] {
            let profile = Profile::read(input.as_bytes()).unwrap();
            assert!(profile.samples() <= 1 && profile.svg("x").ends_with("</svg>\n"));
        }
    }

    #[test]
    fn labels_fit_and_keep_the_end() {
        assert_eq!(shortened("alpha::beta", 8), "…a::beta");
        assert_eq!(shortened("alpha", 5), "alpha");
        assert_eq!(shortened("alpha", 2), "");
    }
}
