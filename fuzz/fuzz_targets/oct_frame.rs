//! A tunnel's stream of frames, in pieces: the first byte of the input says which kind of tunnel, the rest of it how long
//! each piece is.
#![no_main]

use libfuzzer_sys::fuzz_target;
use opencluster_proxy::tunnel::oct::frame::{Decoder, Event, Framing};

fuzz_target!(|input: &[u8]| {
    let Some((&piece, stream)) = input.split_first() else { return };
    let framing = if piece & 1 == 0 { Framing::Leased } else { Framing::Shared };
    let mut decoder = Decoder::new(framing);
    for mut rest in stream.chunks(usize::from(piece >> 1) + 1) {
        while !rest.is_empty() {
            let Ok((used, event)) = decoder.next(rest) else { return };
            assert!(used > 0 && used <= rest.len());
            if let Some(Event::Data(length)) = event {
                assert!(length > 0 && length <= used);
            }
            rest = &rest[used..];
        }
    }
});
