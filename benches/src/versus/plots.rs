//! The pictures of the report.

use std::fs;
use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::figures::Figures;
use super::results::{Known, Results};
use super::rows::{FLAT, Ours, Row, Series};
use super::sample::Metric;
use super::verdict::name;
use crate::Error;

/// File and caption of each.
pub(crate) const ALL: [(&str, &str); 4] = [
    (
        "rates.svg",
        "Requests a second, as multiples of qemu-storage-daemon's",
    ),
    (
        "cpu.svg",
        "Processor time per request, as multiples of qemu-storage-daemon's",
    ),
    ("latency.svg", "Median latency over the depth of the queue"),
    (
        "scaling.svg",
        "Processor time per request over depth, devices and regions of guest memory",
    ),
];

/// Rows whose bars are drawn.
const GROUPS: [(&str, &str); 9] = [
    ("null-d32", "null\ndepth 32"),
    ("null-d64-poll", "null, polling\ndepth 64"),
    ("tmpfs-randread-d32", "tmpfs reads\ndepth 32"),
    ("tmpfs-randwrite-d32", "tmpfs writes\ndepth 32"),
    ("tmpfs-seqread-d32", "tmpfs in order\ndepth 32"),
    ("tmpfs-64k-d16", "tmpfs 64 KiB\ndepth 16"),
    ("disk-randread-d1", "disk reads\ndepth 1"),
    ("disk-randread-d32", "disk reads\ndepth 32"),
    ("disk-randwrite-d32", "disk writes\ndepth 32"),
];

const FONT: &str = "sans-serif";
const INK: RGBColor = RGBColor(36, 41, 47);
const FAINT: RGBColor = RGBColor(208, 215, 222);
const OURS: RGBColor = RGBColor(9, 105, 218);

/// Of everybody else, in the order they come.
const COLOURS: [RGBColor; 8] = [
    RGBColor(218, 118, 9),
    RGBColor(246, 189, 96),
    RGBColor(130, 80, 223),
    RGBColor(26, 127, 55),
    RGBColor(207, 34, 46),
    RGBColor(116, 196, 118),
    RGBColor(191, 135, 0),
    RGBColor(80, 80, 160),
];

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Draws all for which there are figures into `directory`, and removes the others.
pub(crate) fn draw(
    directory: &Path,
    rows: &[Row],
    results: &Results,
    figures: &Figures<'_>,
) -> Result<(), Error> {
    fs::create_dir_all(directory)?;
    for (file, title) in ALL {
        let path = directory.join(file);
        let drawn = match file {
            "rates.svg" => bars(&path, title, Metric::Rate, results, figures)?,
            "cpu.svg" => bars(&path, title, Metric::BackendCpu, results, figures)?,
            "latency.svg" => latency(&path, title, rows, results, figures)?,
            _ => scaling(&path, title, rows, figures)?,
        };
        if !drawn && path.exists() {
            fs::remove_file(&path)?;
        }
    }
    Ok(())
}

/// A bar for each contender and row: how many times what the first qemu-storage-daemon does at its best.
fn bars(
    path: &Path,
    title: &str,
    metric: Metric,
    results: &Results,
    figures: &Figures<'_>,
) -> Result<bool, Error> {
    let Some(reference) = results.contenders.iter().find(|known| known.is_qemu) else {
        return Ok(false);
    };
    let mut groups = Vec::new();
    for (row, label) in GROUPS {
        let is_reference = |known: &Known| known.family == reference.family;
        let best = figures.best_of_each_family(row, metric, is_reference);
        let Some(best) = best.first() else {
            continue;
        };
        let shown = shown_in(row, metric, figures);
        let heights: Vec<(String, f64)> = shown
            .iter()
            .filter_map(|known| {
                let ratio = figures.ratio(row, &known.name, &best.name, metric)?;
                Some((legend_of(known), ratio.median))
            })
            .collect();
        groups.push((label, heights));
    }
    if groups.is_empty() {
        return Ok(false);
    }
    // In the order they are listed in, whichever row they are in first.
    let mut names: Vec<String> = Vec::new();
    for name in results.contenders.iter().map(legend_of) {
        let mut drawn = groups.iter().flat_map(|(_, heights)| heights);
        if drawn.any(|(who, _)| *who == name) && !names.contains(&name) {
            names.push(name);
        }
    }
    let colours = Colours::of(results);
    let root = SVGBackend::new(path, (1180, 470)).into_drawing_area();
    draw_bars(&root, title, &groups, &names, &colours)?;
    root.present()?;
    Ok(true)
}

/// This back-end as it is and with io_uring, each peer at its best, and the bare loops.
fn shown_in<'a>(row: &str, metric: Metric, figures: &Figures<'a>) -> Vec<&'a Known> {
    let ours = [Ours::Default, Ours::IoUring].map(name);
    let best_peers = figures.best_of_each_family(row, metric, |known| known.is_peer);
    let is_best = |known: &Known| best_peers.iter().any(|best| best.name == known.name);
    figures
        .contenders_of(row)
        .into_iter()
        .filter(|known| {
            ours.contains(&known.name)
                || known.name == "bare loop, io_submit"
                || known.name == "fio, libaio"
                || known.is_peer && is_best(known)
        })
        .collect()
}

/// Peers by their family, since it is whichever variant of it did best.
fn legend_of(known: &Known) -> String {
    if known.is_peer {
        known.family.clone()
    } else {
        known.name.clone()
    }
}

fn draw_bars(
    root: &Area<'_>,
    title: &str,
    groups: &[(&str, Vec<(String, f64)>)],
    names: &[String],
    colours: &Colours,
) -> Result<(), Error> {
    root.fill(&WHITE)?;
    let body = root.titled(title, (FONT, 19).into_font().color(&INK))?;
    let entries = || {
        names
            .iter()
            .map(|name| (name.as_str(), colours.of_name(name)))
    };
    let height = draw_legend(&body, entries())?;
    let (_, body) = body.split_vertically(height);
    let heights = groups.iter().flat_map(|(_, heights)| heights);
    let highest = heights.map(|(_, height)| *height).fold(1.0, f64::max);
    let mut chart = ChartBuilder::on(&body)
        .margin(12)
        .x_label_area_size(44)
        .y_label_area_size(44)
        .build_cartesian_2d(0.0..groups.len() as f64, 0.0..highest * 1.08)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .x_labels(0)
        .y_labels(8)
        .light_line_style(TRANSPARENT)
        .bold_line_style(FAINT)
        .axis_style(INK)
        .label_style((FONT, 13).into_font().color(&INK))
        .y_label_formatter(&|value| format!("{value:.1}x"))
        .draw()?;
    // As wide in every group, so that they can be told apart by it, too.
    let widest = groups.iter().map(|(_, heights)| heights.len()).max();
    let width = 0.86 / widest.unwrap_or(1).max(1) as f64;
    for name in names {
        let colour = colours.of_name(name);
        let mut boxes = Vec::new();
        for (group, (_, heights)) in groups.iter().enumerate() {
            let left = group as f64 + 0.5 - width * heights.len() as f64 / 2.0;
            for (turn, (_, height)) in heights
                .iter()
                .enumerate()
                .filter(|(_, (who, _))| who == name)
            {
                let left = left + width * turn as f64;
                boxes.push((left, left + width * 0.9, *height));
            }
        }
        chart.draw_series(boxes.iter().map(|&(left, right, height)| {
            Rectangle::new([(left, 0.0), (right, height)], colour.filled())
        }))?;
        let centred = centred(11, VPos::Bottom);
        chart.draw_series(boxes.iter().map(|&(left, right, height)| {
            Text::new(
                multiple(height),
                (f64::midpoint(left, right), height + highest * 0.006),
                centred.clone(),
            )
        }))?;
    }
    chart.draw_series(std::iter::once(PathElement::new(
        [(0.0, 1.0), (groups.len() as f64, 1.0)],
        INK.stroke_width(1),
    )))?;
    for (group, (label, _)) in groups.iter().enumerate() {
        // From the corner of the whole picture.
        let (x, y) = chart.backend_coord(&(group as f64 + 0.5, 0.0));
        for (line, text) in (0..).zip(label.split('\n')) {
            let style = centred(13, VPos::Top);
            root.draw(&Text::new(text, (x, y + 7 + 16 * line), style))?;
        }
    }
    Ok(())
}

/// Names and colours in lines from the left; returns how high they are.
fn draw_legend<'a>(
    area: &Area<'_>,
    entries: impl Iterator<Item = (&'a str, RGBColor)>,
) -> Result<i32, Error> {
    const LINE: i32 = 20;
    let style = TextStyle::from((FONT, 13).into_font())
        .color(&INK)
        .pos(Pos::new(HPos::Left, VPos::Center));
    let width = i32::try_from(area.dim_in_pixel().0)?;
    let (mut x, mut y) = (56, LINE / 2);
    for (name, colour) in entries {
        // Whoever shows it chooses the font: of most, a letter is narrower than this.
        let needed = 20 + 8 * i32::try_from(name.len())?;
        if x + needed > width {
            (x, y) = (56, y + LINE);
        }
        area.draw(&Rectangle::new(
            [(x, y - 5), (x + 12, y + 5)],
            colour.filled(),
        ))?;
        area.draw(&Text::new(name.to_owned(), (x + 18, y), style.clone()))?;
        x += needed + 12;
    }
    Ok(y + LINE / 2)
}

fn centred(size: u32, vertical: VPos) -> TextStyle<'static> {
    TextStyle::from((FONT, size).into_font())
        .color(&INK)
        .pos(Pos::new(HPos::Center, vertical))
}

fn legend<'a, 'b, C>(
    chart: &mut ChartContext<'a, SVGBackend<'b>, C>,
    position: SeriesLabelPosition,
) -> Result<(), Error>
where
    C: CoordTranslate,
    'b: 'a,
{
    chart
        .configure_series_labels()
        .position(position)
        .background_style(WHITE.mix(0.9))
        .border_style(FAINT)
        .label_font((FONT, 13).into_font().color(&INK))
        .draw()?;
    Ok(())
}

/// Everybody has one colour in all pictures: ours blue, what is no back-end grey.
struct Colours {
    peers: Vec<String>,
}

impl Colours {
    fn of(results: &Results) -> Self {
        let mut peers: Vec<String> = Vec::new();
        for known in results.contenders.iter().filter(|known| known.is_peer) {
            if !peers.contains(&known.family) {
                peers.push(known.family.clone());
            }
        }
        Self { peers }
    }

    fn of_name(&self, name: &str) -> RGBColor {
        match name {
            "blk-dataplane" => OURS,
            _ if name.starts_with("blk-dataplane") => RGBColor(128, 184, 248),
            _ if name.starts_with("bare loop") => RGBColor(110, 119, 129),
            _ if name.starts_with("fio") => RGBColor(175, 184, 193),
            _ => {
                let place = self
                    .peers
                    .iter()
                    .position(|peer| name.starts_with(peer.as_str()));
                COLOURS[place.unwrap_or(0) % COLOURS.len()]
            }
        }
    }
}

/// Points of a line: depth, say, and what was measured there.
type Line = Vec<(f64, f64)>;

fn line(
    rows: &[Row],
    series: Series,
    contender: &str,
    metric: Metric,
    figures: &Figures<'_>,
) -> Line {
    let mut points: Line = rows
        .iter()
        .flat_map(|row| row.points.iter().map(move |point| (row, point)))
        .filter(|(_, point)| point.0 == series)
        .filter_map(|(row, point)| {
            let figure = figures.figure(&row.id, contender, metric)?;
            Some((f64::from(point.1).log2(), figure))
        })
        .collect();
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    points
}

fn latency(
    path: &Path,
    title: &str,
    rows: &[Row],
    results: &Results,
    figures: &Figures<'_>,
) -> Result<bool, Error> {
    let Some(row) = rows
        .iter()
        .rfind(|row| row.points.iter().any(|point| point.0 == Series::Latency))
    else {
        return Ok(false);
    };
    let lines: Vec<(String, Line)> = figures
        .contenders_of(&row.id)
        .into_iter()
        .map(|known| {
            let line = line(rows, Series::Latency, &known.name, Metric::Median, figures);
            let line = line.into_iter().map(|(x, ns)| (x, ns / 1e3)).collect();
            (known.name.clone(), line)
        })
        .collect();
    if lines.iter().all(|(_, line)| line.len() < 2) {
        return Ok(false);
    }
    let root = SVGBackend::new(path, (900, 430)).into_drawing_area();
    root.fill(&WHITE)?;
    let points = || lines.iter().flat_map(|(_, line)| line);
    let (lowest, highest) = range(points().map(|point| point.1));
    let last = points().map(|point| point.0).fold(1.0, f64::max);
    let mut chart = ChartBuilder::on(&root)
        .caption(title, (FONT, 19).into_font().color(&INK))
        .margin(12)
        .x_label_area_size(44)
        .y_label_area_size(60)
        .build_cartesian_2d(
            -0.15..last + 0.15,
            (lowest / 1.5..highest * 1.5).log_scale(),
        )?;
    chart
        .configure_mesh()
        .x_labels(10)
        .y_labels(8)
        .light_line_style(TRANSPARENT)
        .bold_line_style(FAINT)
        .axis_style(INK)
        .label_style((FONT, 13).into_font().color(&INK))
        .x_desc("requests in flight (tmpfs image, 4 KiB reads, client sleeping)")
        .x_label_formatter(&|power| power_of_two(*power))
        .y_label_formatter(&|value| format!("{value:.0} us"))
        .draw()?;
    let colours = Colours::of(results);
    for (name, line) in &lines {
        draw_line(&mut chart, name, line, colours.of_name(name))?;
        let style = centred(11, VPos::Bottom);
        chart.draw_series(
            line.iter()
                .map(|&(x, y)| Text::new(short(y), (x, y * 1.07), style.clone())),
        )?;
    }
    legend(&mut chart, SeriesLabelPosition::UpperLeft)?;
    root.present()?;
    Ok(true)
}

fn scaling(path: &Path, title: &str, rows: &[Row], figures: &Figures<'_>) -> Result<bool, Error> {
    let ours = name(Ours::Default);
    let panels = [
        (Series::Depth, "requests in flight, client polling"),
        (Series::Devices, "devices, depth 32 each, clients sleeping"),
        (
            Series::MemoryRegions,
            "regions of guest memory, client polling",
        ),
    ]
    .map(|(series, axis)| {
        let line = line(rows, series, &ours, Metric::BackendCpu, figures);
        // The same as is judged: from where it has to be flat.
        let flat = Series::FLAT.iter().find(|flat| flat.0 == series);
        let from = flat.map_or(0.0, |flat| f64::from(flat.1).log2());
        (axis, line, from)
    });
    if panels.iter().all(|(_, line, _)| line.len() < 2) {
        return Ok(false);
    }
    let root = SVGBackend::new(path, (1180, 400)).into_drawing_area();
    root.fill(&WHITE)?;
    let body = root.titled(title, (FONT, 19).into_font().color(&INK))?;
    for (area, (axis, line, from)) in body.split_evenly((1, 3)).iter().zip(panels) {
        if line.len() >= 2 {
            draw_panel(area, axis, &ours, &line, from)?;
        }
    }
    root.present()?;
    Ok(true)
}

/// A line over powers of two, and the band that it has to stay within from `from` on.
fn draw_panel(
    area: &Area<'_>,
    axis: &str,
    name: &str,
    line: &[(f64, f64)],
    from: f64,
) -> Result<(), Error> {
    let (_, highest) = range(line.iter().map(|point| point.1));
    let last = line.iter().map(|point| point.0).fold(1.0, f64::max);
    let mut chart = ChartBuilder::on(area)
        .margin(12)
        .x_label_area_size(44)
        .y_label_area_size(64)
        .build_cartesian_2d(-0.4..last + 0.4, 0.0..highest * 1.45)?;
    chart
        .configure_mesh()
        .x_labels(10)
        .y_labels(6)
        .light_line_style(TRANSPARENT)
        .bold_line_style(FAINT)
        .axis_style(INK)
        .label_style((FONT, 13).into_font().color(&INK))
        .x_desc(axis)
        .x_label_formatter(&|power| power_of_two(*power))
        .y_label_formatter(&|value| format!("{value:.0} ns"))
        .draw()?;
    let flat = line.iter().filter(|point| point.0 >= from);
    let (cheapest, _) = range(flat.map(|point| point.1));
    if cheapest.is_finite() {
        let band = [(from, cheapest), (last, cheapest * FLAT)];
        let style = OURS.mix(0.14).filled();
        chart
            .draw_series(std::iter::once(Rectangle::new(band, style)))?
            .label(format!("within {FLAT}x of the cheapest"))
            .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 12, y + 5)], style));
    }
    draw_line(&mut chart, name, line, OURS)?;
    let style = centred(12, VPos::Bottom);
    chart.draw_series(
        line.iter()
            .map(|&(x, y)| Text::new(short(y), (x, y + highest * 0.03), style.clone())),
    )?;
    legend(&mut chart, SeriesLabelPosition::UpperRight)
}

fn draw_line<'a, X, Y>(
    chart: &mut ChartContext<'a, SVGBackend<'_>, Cartesian2d<X, Y>>,
    name: &str,
    line: &[(f64, f64)],
    colour: RGBColor,
) -> Result<(), Error>
where
    X: Ranged<ValueType = f64>,
    Y: Ranged<ValueType = f64>,
{
    let points = line.iter().copied();
    chart
        .draw_series(LineSeries::new(points, colour.stroke_width(2)))?
        .label(name)
        .legend(move |(x, y)| PathElement::new([(x, y), (x + 12, y)], colour.stroke_width(2)));
    chart.draw_series(
        line.iter()
            .map(|&point| Circle::new(point, 3, colour.filled())),
    )?;
    Ok(())
}

/// Between two powers there is nothing to be said.
fn power_of_two(power: f64) -> String {
    if power < -0.01 || (power - power.round()).abs() > 0.01 {
        return String::new();
    }
    format!("{:.0}", power.exp2())
}

fn short(value: f64) -> String {
    if value < 9.95 {
        format!("{value:.1}")
    } else {
        format!("{value:.0}")
    }
}

fn multiple(value: f64) -> String {
    if value < 0.995 {
        format!("{value:.2}")
    } else {
        short(value)
    }
}

/// The smallest and the largest.
fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    values.fold((f64::INFINITY, 0.0), |(low, high), value| {
        (low.min(value), high.max(value))
    })
}

#[cfg(test)]
mod tests {
    use super::super::figures::tests::results;
    use super::super::rows;
    use super::*;

    #[test]
    fn a_picture_is_drawn_of_what_there_is_and_removed_where_there_is_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let file = |name: &str| directory.path().join(name);
        let results = results(&[
            ("null-d32", "blk-dataplane", &[4.0e6]),
            ("null-d32", "qemu 7, aio=native", &[1.0e6]),
            ("scale-depth-1", "blk-dataplane", &[1.0e6]),
            ("scale-depth-256", "blk-dataplane", &[9.0e6]),
        ]);
        fs::write(file("latency.svg"), "of yesterday").unwrap();
        let figures = Figures::new(&results);
        draw(directory.path(), &rows::all(false), &results, &figures).unwrap();
        let rates = fs::read_to_string(file("rates.svg")).unwrap();
        for text in ["4.0", "blk-dataplane", "qemu 7", "null"] {
            assert!(rates.contains(text), "{text}");
        }
        assert!(file("scaling.svg").exists() && file("cpu.svg").exists());
        assert!(!file("latency.svg").exists());
    }
}
