use proptest::prelude::*;

use super::*;

const STREAM: u32 = 0x0102_0304;

fn target() -> impl Strategy<Value = SocketAddr> {
    let v4 = (1_u32..0xE000_0000).prop_map(|bits| IpAddr::V4(Ipv4Addr::from(bits)));
    let v6 = (1_u128..u128::MAX >> 8).prop_map(|bits| IpAddr::V6(Ipv6Addr::from(bits)));
    (prop_oneof![v4, v6], 1_u16..).prop_map(|(ip, port)| SocketAddr::new(ip, port))
}

fn refusal() -> impl Strategy<Value = Refusal> {
    (0..RefusalCode::ALL.len(), "\\PC{0,80}").prop_map(|(code, text)| Refusal::new(RefusalCode::ALL[code], text))
}

/// What is sent, with data as its bytes.
#[derive(Clone, Debug, PartialEq)]
enum Sent {
    Control(Event),
    Data(Vec<u8>),
}

fn sent(framing: Framing) -> impl Strategy<Value = Sent> {
    let shared = framing == Framing::Shared;
    prop_oneof![
        (target(), any::<u64>(), any::<u128>()).prop_map(|(target, flow, trace)| Sent::Control(Event::Open(Open {
            target,
            flow,
            trace
        }))),
        any::<u16>().prop_map(move |worker| Sent::Control(Event::Accept(shared.then_some(worker)))),
        refusal().prop_map(|refusal| Sent::Control(Event::Refuse(refusal))),
        Just(Sent::Control(Event::Fin)),
        Just(Sent::Control(Event::Reset)),
        (any::<u64>(), any::<u16>(), 1..=MAX_CREDIT).prop_map(move |(flow, worker, bytes)| {
            let continued = Event::Continue(Continue { flow, worker });
            Sent::Control(match shared {
                false => continued,
                true if worker % 2 == 0 => Event::Move,
                true => Event::Credit(bytes),
            })
        }),
        prop::collection::vec(any::<u8>(), 1..600).prop_map(Sent::Data),
    ]
}

fn encode(frame: &Sent, stream: Option<u32>, out: &mut Vec<u8>) {
    match frame {
        Sent::Control(Event::Open(open)) => open.encode(stream, out),
        Sent::Control(Event::Accept(Some(worker))) => encode_accept(stream.expect("shared"), *worker, out),
        Sent::Control(Event::Accept(None)) => encode_empty(Kind::Accept, stream, out),
        Sent::Control(Event::Refuse(refusal)) => refusal.encode(stream, out),
        Sent::Control(Event::Fin) => encode_empty(Kind::Fin, stream, out),
        Sent::Control(Event::Reset) => encode_empty(Kind::Reset, stream, out),
        Sent::Control(Event::Move) => encode_empty(Kind::Move, stream, out),
        Sent::Control(Event::Credit(bytes)) => encode_credit(stream.expect("shared"), *bytes, out),
        Sent::Control(Event::Continue(continued)) => continued.encode(out),
        Sent::Control(Event::Data(_)) => unreachable!("data has its own variant"),
        Sent::Data(bytes) => {
            match stream {
                Some(stream) => out.extend_from_slice(&shared_data_header(stream, bytes.len())),
                None => out.extend_from_slice(&data_header(bytes.len())),
            }
            out.extend_from_slice(bytes);
        }
    }
}

/// Decodes everything in `pieces`, joining the data of neighbouring frames.
fn decode(framing: Framing, pieces: &[&[u8]]) -> Result<Vec<Sent>, FrameError> {
    let mut decoder = Decoder::new(framing);
    let mut found: Vec<Sent> = Vec::new();
    for piece in pieces {
        let mut rest = *piece;
        while !rest.is_empty() {
            let (used, event) = decoder.next(rest)?;
            assert!(used > 0, "the decoder must make progress");
            if event.is_some() && framing == Framing::Shared {
                assert_eq!(decoder.stream(), STREAM);
            }
            match event {
                Some(Event::Data(length)) => {
                    let bytes = &rest[used - length..used];
                    if let Some(Sent::Data(last)) = found.last_mut() {
                        last.extend_from_slice(bytes);
                    } else {
                        found.push(Sent::Data(bytes.to_vec()));
                    }
                }
                Some(event) => found.push(Sent::Control(event)),
                None => {}
            }
            rest = &rest[used..];
        }
    }
    Ok(found)
}

fn joined(frames: &[Sent]) -> Vec<Sent> {
    let mut joined: Vec<Sent> = Vec::new();
    for frame in frames {
        match (joined.last_mut(), frame) {
            (Some(Sent::Data(last)), Sent::Data(bytes)) => last.extend_from_slice(bytes),
            _ => joined.push(frame.clone()),
        }
    }
    joined
}

proptest! {
    #[test]
    fn frames_survive_any_fragmentation(
        (framing, frames) in prop_oneof![Just(Framing::Leased), Just(Framing::Shared)]
            .prop_flat_map(|framing| (Just(framing), prop::collection::vec(sent(framing), 0..12))),
        cuts in prop::collection::vec(1_usize..64, 0..200),
    ) {
        let mut bytes = Vec::new();
        for frame in &frames {
            encode(frame, (framing == Framing::Shared).then_some(STREAM), &mut bytes);
        }
        let mut pieces = Vec::new();
        let mut rest = bytes.as_slice();
        for cut in cuts {
            let (piece, tail) = rest.split_at(cut.min(rest.len()));
            pieces.push(piece);
            rest = tail;
        }
        pieces.push(rest);
        prop_assert_eq!(decode(framing, &pieces).expect("valid frames"), joined(&frames));
    }

    #[test]
    fn any_bytes_give_frames_or_an_error_and_little_is_kept(
        shared in any::<bool>(),
        bytes in prop::collection::vec(any::<u8>(), 0..2048),
    ) {
        let mut decoder = Decoder::new(if shared { Framing::Shared } else { Framing::Leased });
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let Ok((used, _)) = decoder.next(rest) else { break };
            prop_assert!(used > 0 && used <= rest.len());
            prop_assert!(decoder.partial.len() < SHARED_HEADER + MAX_CONTROL);
            rest = &rest[used..];
        }
    }

    #[test]
    fn what_parses_as_open_encodes_to_the_same_bytes(payload in prop::collection::vec(any::<u8>(), 0..64)) {
        if let Ok(open) = Open::parse(&payload) {
            let mut bytes = Vec::new();
            open.encode(None, &mut bytes);
            prop_assert_eq!(&bytes[HEADER..], payload.as_slice());
        }
    }
}

#[test]
fn garbage_is_refused_at_its_first_byte() {
    assert_eq!(Decoder::default().next(b"GET / HTTP/1.1\r\n"), Err(FrameError::UnknownKind(b'G')));
    assert_eq!(Decoder::default().next(&[0]), Err(FrameError::UnknownKind(0)));
}

#[test]
fn lengths_that_a_type_cannot_have_are_refused() {
    for header in [[1, 0, 0, 34], [2, 0, 0, 1], [3, 0, 0, 1], [3, 1, 0, 0], [4, 0, 0, 0], [4, 255, 0, 0], [5, 0, 0, 9]]
    {
        let error = Decoder::default().next(&header).expect_err("refused");
        assert!(matches!(error, FrameError::BadLength { .. }), "{header:?}: {error}");
    }
}

#[test]
fn open_with_another_version_flags_family_or_target_is_refused() {
    let open = Open { target: "10.0.0.1:80".parse().expect("address"), flow: 1, trace: 2 };
    let mut frame = Vec::new();
    open.encode(None, &mut frame);
    let payload = &frame[HEADER..];
    assert_eq!(Open::parse(payload), Ok(open));
    let with = |at: usize, byte: u8| {
        let mut changed = payload.to_vec();
        changed[at] = byte;
        Open::parse(&changed).expect_err("refused")
    };
    assert_eq!(with(0, 2), FrameError::Version(2));
    assert_eq!(with(1, 1), FrameError::ReservedFlags(1));
    assert_eq!(with(2, 9), FrameError::Family(9));
    assert_eq!(with(4, 0), FrameError::Target, "port 0");
    assert_eq!(with(5, 224), FrameError::Target, "multicast");
}

#[test]
fn a_refusal_is_cut_to_size_and_stripped_of_control_characters() {
    let refusal = Refusal::new(RefusalCode::Denied, "é\n".repeat(400));
    assert!(refusal.text.len() <= MAX_REFUSAL_TEXT);
    let mut frame = Vec::new();
    refusal.encode(None, &mut frame);
    assert_eq!(Decoder::default().next(&frame), Ok((frame.len(), Some(Event::Refuse(refusal)))));
}
