//! How full the segments of a shard are, a character each, or one for several where there are many.

use super::report::SegmentInspection;

const COLUMNS: usize = 64;
const ROWS_MAX: usize = 32;
/// By how much of it is needed.
const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
const FREE: char = '·';
const NOT_NEEDED: char = '_';
const UNSEALED: char = '○';
const LOST: char = '✗';

/// Lines of the picture, and what its characters mean.
pub fn draw(segments: &[SegmentInspection]) -> Vec<String> {
    let per_character = segments.len().div_ceil(COLUMNS * ROWS_MAX).max(1);
    let characters: Vec<char> = segments.chunks(per_character).map(character).collect();
    let mut lines: Vec<String> = Vec::new();
    for (row, cells) in characters.chunks(COLUMNS).enumerate() {
        let first = row * COLUMNS * per_character;
        lines.push(format!("{first:>8} {}", cells.iter().collect::<String>()));
    }
    lines.push(format!(
        "         {FREE} free  {NOT_NEEDED} nothing needed  ▁ to █ needed, in eighths  {UNSEALED} without a footer  {LOST} lost"
    ));
    if per_character > 1 {
        lines.push(format!("         each character: {per_character} segments, the mean of those in use"));
    }
    lines
}

/// What is out of order shows, however many segments share a character.
fn character(segments: &[SegmentInspection]) -> char {
    let any = |state: &str| segments.iter().any(|segment| segment.state == state);
    if any("lost") {
        return LOST;
    }
    if any("unsealed") {
        return UNSEALED;
    }
    let used: Vec<f64> =
        segments.iter().filter(|segment| segment.state != "free").map(|segment| segment.live_share).collect();
    if used.is_empty() {
        return FREE;
    }
    let share = used.iter().sum::<f64>() / used.len() as f64;
    let eighth = (share * BARS.len() as f64).ceil() as usize;
    if eighth == 0 { NOT_NEEDED } else { BARS[eighth.min(BARS.len()) - 1] }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(state: &'static str, live_share: f64) -> SegmentInspection {
        SegmentInspection {
            segment: 0,
            state,
            offset_bytes: 0,
            sequence: None,
            opened_s: None,
            first_batch: None,
            end_batch: None,
            live_blocks: 0,
            live_share,
            note_bytes: 0,
        }
    }

    #[test]
    fn a_picture_has_a_character_for_each_segment() {
        let shares = [("free", 0.0), ("sealed", 0.0), ("sealed", 0.01), ("sealed", 0.5), ("sealed", 0.99)];
        let mut segments: Vec<_> = shares.map(|(state, share)| segment(state, share)).into();
        segments.extend([segment("unsealed", 0.5), segment("lost", 0.0)]);
        assert_eq!(draw(&segments)[0], "       0 ·_▁▄█○✗");
    }

    #[test]
    fn a_shard_of_the_largest_size_still_fits_on_a_page_and_shows_what_is_lost() {
        let mut segments: Vec<_> = (0..262_144).map(|_| segment("sealed", 0.3)).collect();
        segments[200_000].state = "lost";
        let lines = draw(&segments);
        assert!(lines.len() <= ROWS_MAX + 2 && lines.concat().matches(LOST).count() == 2, "{lines:#?}");
    }
}
