//! The wire: captured at the switch while the applications say the marker, and searched for it.

use anyhow::ensure;

use super::applications::{self, MARKER};
use super::stage::{HERE, Stage, said};
use super::story::Story;

pub(crate) fn no_plaintext(story: &mut Story, stage: &Stage) -> anyhow::Result<()> {
    story.check("wire", "No plaintext on the wire", || {
        let captures = [stage.capture("a", "wire-a")?, stage.capture("b", "wire-b")?];
        applications::say_marker(stage)?;
        let mut size = 0;
        for capture in captures {
            let captured = capture.stop()?;
            let seen = captured.count(MARKER.as_bytes());
            ensure!(seen == 0, "the marker was seen {seen} times");
            // The large file crossed each of the two links whole.
            ensure!(captured.len() > 128 << 20, "only {} bytes were captured", captured.len());
            size += captured.len();
        }
        Ok(format!("{} MiB captured on both links, the marker is nowhere in them", size >> 20))
    })?;
    story.check("wire-control", "Without Opencluster the same search finds it", || {
        let file = format!("{HERE}/web");
        let mut server =
            stage.host("y", &["nginx", "-e", "stderr", "-p", &file, "-c", &format!("{file}/nginx.conf")])?;
        let mut server = server.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).spawn()?;
        let capture = stage.capture("x", "wire-control")?;
        let fetched = said(&mut stage.host(
            "x",
            &[
                "curl",
                "-sf",
                "--retry",
                "20",
                "--retry-connrefused",
                "--retry-delay",
                "0",
                "-m",
                "60",
                "-o",
                "/dev/null",
                "http://10.88.0.201:8080/large",
            ],
        )?);
        let captured = capture.stop();
        server.kill()?;
        server.wait()?;
        fetched?;
        let seen = captured?.count(MARKER.as_bytes());
        ensure!(seen > 1000, "the marker was seen only {seen} times: the search proves nothing");
        Ok(format!("the same file from y to x: {seen} times"))
    })
}
